"""FLORA (WACV 2024, arXiv 2311.03912), a file a section."""
