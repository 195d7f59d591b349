"""Small modules with planted faults, and the catalogue of runs that `faults.py` trains with them."""
