"""What every other part stands on.

cache.py    what lies in the cache folder, and what of it no run uses; a command
"""
