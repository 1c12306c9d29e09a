"""What may go wrong, made to go wrong: each case states a promise and tries to break it.

pytest runs every case a few times, `scripts/fault_drill.py` as often as it takes to believe it.
"""
