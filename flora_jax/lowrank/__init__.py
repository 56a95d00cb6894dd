"""Low-rank supernets: rank spaces, weight inheritance and extraction."""
