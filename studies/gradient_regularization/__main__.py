"""``python -m studies.gradient_regularization``."""

from studies.command import main
from studies.gradient_regularization.study import STUDY

if __name__ == "__main__":
    main(STUDY)
