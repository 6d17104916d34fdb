"""How a scorer is measured: texts read, questions asked, attention seen, a fit."""
