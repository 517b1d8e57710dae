"""The sweep of DREG (arXiv 2606.23942): ``python -m studies.dreg``."""
