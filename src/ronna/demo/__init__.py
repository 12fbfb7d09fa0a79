"""Demonstrations that need nothing but Python itself: no download, no account."""
