"""One process among others: launched, joined, watched, asked to stop."""
