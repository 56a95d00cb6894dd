"""Additions of ours to FLORA, each behind a switch that is off as published."""
