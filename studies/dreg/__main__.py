"""``python -m studies.dreg``."""

from studies.command import main
from studies.dreg.study import STUDY

if __name__ == "__main__":
    main(STUDY)
