"""Architecture search: filtering the rank space and evolving subnets in it."""
