"""Labels and figures as pictures."""
