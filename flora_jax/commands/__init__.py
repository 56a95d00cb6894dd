"""Commands for finished models: predict, evaluate, benchmark, push to the hub."""
