"""What the command line does with one finished model: predict and evaluate."""
