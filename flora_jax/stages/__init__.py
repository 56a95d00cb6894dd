"""What a run does, stage by stage: `names` says what they are, `functions` does them."""
