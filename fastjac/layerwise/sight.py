"""Which passes of an attached model look at the functions that it calls (`calls`).

The first one does. If no function takes part in its terms, the model consists of modules, and the
passes after it do not look, which costs them nothing. A pass looks again if a layer is left out
that was not left out before, and after every 64 passes.
"""

from __future__ import annotations

import warnings
from typing import Any

from fastjac.layerwise.reasons import REPLACED

AGAIN = 64
"""So many passes that do not look follow one another at most."""


class Sight:
    """What the passes of a model that looked have found."""

    def __init__(self) -> None:
        self.looks = True  # whether the next pass looks
        self.blind = 0  # the number of passes since one looked
        self.reasons: dict[str, str] = {}  # for which layers are left out
        self.of_functions: list[tuple[str, str]] = []  # the same, of layers that are functions
        self.unknown: set[str] = set()  # left out by a pass that did not look, and by none that did

    def looked(self, seen: Any) -> None:
        """Called after a pass that looked."""
        self.reasons.update((n, why) for n, why in seen.left_out if "no activation" in why)
        self.of_functions = [entry for entry in seen.left_out if entry[0] not in seen.names]
        self.unknown -= self.reasons.keys()
        if self.blind:
            missed = {t.call.name for t in seen.terms if t.call.function}
            self.unknown -= missed
            if missed:
                warnings.warn(
                    f"the layers {', '.join(sorted(missed))} are followed by activations that are "
                    "functions, such as F.relu, which was not so when the model first ran. They "
                    f"count now, but may be missing in the values of up to {self.blind} passes "
                    "before this one",
                    stacklevel=6,
                )
        self.looks = bool(seen.functions or self.unknown)
        self.blind = 0 if not self.unknown else self.blind

    def replaced(self, names: list[str], seen: Any) -> None:
        """Called if modules of the model are others than when the penalty was attached.

        Their forwards do not report, but the functions that they call are seen by passes that look.
        """
        if seen.looks:  # it has seen them
            seen.left_out = [(n, why) for n, why in seen.left_out if n not in names]
        seen.left_out = [(n, REPLACED if n in names else why) for n, why in seen.left_out]
        self.looks, self.blind = True, 0
        warnings.warn(
            "modules of the model were replaced after the penalty was attached: "
            f"{', '.join(names)}. Layers among them count from the next pass on, and cost more: "
            "detach() the penalty, and attach a new one",
            stacklevel=6,
        )
