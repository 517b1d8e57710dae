"""What each cell of the matrix raises, and the page that shows it.

``python tests/matrix_table.py docs/MATRIX.md`` writes the page; `test_matrix.py` checks each cell
and that the page is up to date.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from matrix_things import THINGS, Thing
from matrix_transforms import WAYS, Way
from versions import DIFFERENCES, NEW, OLD


@dataclass(frozen=True)
class Raises:
    """``message`` is a part of the error message; ``note`` says what to do if torch does not."""

    message: str
    note: str = ""


PROJECTED = ("SpectReg *", "DataGrad *", "FrobReg *")
CALLED = ("DREG called", "Contractive called", "AccumulatedDREG called")
BY_AUTOGRAD = ("fused + autograd.grad", "*Reg graph", "DataGrad graph", "* autograd", "* auto")

NO_PASS = Raises("the model has not run since the penalty was attached or last called")
NOT_COUNTED = "the model has run under {}, and such a pass does not count"
NO_GRAD = Raises(
    "element 0 of tensors does not require grad", "leave the mode, because a VJP needs a graph"
)
A_FUNCTION = Raises(
    "it must be an nn.Module, since layer-wise penalties look at its submodules",
    "use the attached form",
)
REENTRANT = Raises("you can either set use_reentrant=False")
AUTOGRAD = Raises("Use engine='autograd'")
ACCUMULATED = Raises("call it outside of the compiled function")
DOUBLE = Raises("torch cannot differentiate compiled code twice")
EAGER_DOUBLE = Raises(
    "does not currently support double backward",
    "pass the model before compiling, and compile the whole step",
)


def each(names: tuple[str, ...], state: Raises) -> dict[str, Raises]:
    return dict.fromkeys(names, state)


FUNC = {
    **each(CALLED, A_FUNCTION),
    **each(
        PROJECTED, Raises("call it outside of the transform, or compute it with torch.func.vjp")
    ),
}
STEP = {
    "AccumulatedDREG called": ACCUMULATED,
    "* chain": AUTOGRAD,
}

TRACED = {
    "fused + autograd.grad": Raises(
        "Change `torch._dynamo.config.trace_autograd_ops` to `True`", "or use `fastjac.compile`"
    )
}

FIXED = Raises(
    "Recompiling function",
    "PyTorch's batching rule for the derivative of GELU fixes the batch size of several cotangents",
)

# The key of a way → a pattern of names of things → what they raise. All other cells are exact.
EXPECTED: dict[str, dict[str, Raises]] = {
    "no_grad": {
        "fused + autograd.grad": NO_GRAD,
        "* attached": Raises(NOT_COUNTED.format("torch.no_grad()")),
        **each(
            PROJECTED, Raises("torch.no_grad() is active: call model and penalty outside of it")
        ),
    },
    "inference_mode": {
        "fused + autograd.grad": NO_GRAD,
        "* attached": Raises(NOT_COUNTED.format("torch.inference_mode()")),
        **each(CALLED, Raises("use torch.no_grad() to get the value without a gradient")),
        **each(PROJECTED, Raises("inference mode is active: call model and penalty outside of it")),
    },
    "through_functional_call": each(CALLED, A_FUNCTION),
    "checkpointed": {
        "fused + func.vjp": Raises(
            "don't yet support saved tensor hooks", "compute the VJP with `autograd.grad`"
        ),
        "AccumulatedDREG called": Raises("checkpoint the whole call of AccumulatedDREG"),
        "* chain": AUTOGRAD,
    },
    "reentrant": {
        **each(BY_AUTOGRAD, REENTRANT),
        "fused + func.vjp": Raises(
            "it must override the setup_context staticmethod", "set `use_reentrant=False`"
        ),
        **each(
            ("DREG *", "Contractive *", "AccumulatedDREG *"),
            Raises("use checkpoint(..., use_reentrant=False)"),
        ),
        "* chain": AUTOGRAD,
    },
    **{
        name: {
            **FUNC,
            "fused + autograd.grad": Raises(words, "compute the VJP with `torch.func.vjp`"),
        }
        for name, words in (
            ("func_grad", "appears to not have been used in the graph"),
            ("func_vjp", "appears to not have been used in the graph"),
            ("func_jvp", "does not require grad"),
            ("func_jacrev", "appears to not have been used in the graph"),
            ("func_vmap", "does not require grad"),
        )
    },
    "compiled_model": {
        **each(BY_AUTOGRAD, DOUBLE),
        "fused + autograd.grad": EAGER_DOUBLE,
        "fused + func.vjp": Raises(
            "torch.func.grad is also wrapped within a torch.compile", "compile the whole step"
        ),
        **each(CALLED, Raises("pass the module before compiling")),
        "* chain": DOUBLE,
    },
    "broken_step": {
        "fused + autograd.grad": EAGER_DOUBLE,
        "AccumulatedDREG called": ACCUMULATED,
        "* chain": AUTOGRAD,
    },
    **{name: STEP | TRACED for name in ("step", "three_steps")},
    "dynamic_shapes": {
        **STEP,
        **TRACED,
        **each(("FrobReg graph", "FrobReg autograd"), FIXED),
    },
    **{name: STEP for name in ("fastjac_step", "whole_step")},
    "exported": {
        "fused + func.vjp": Raises("call the function of fastjac, or use torch.autograd"),
        "* attached": NO_PASS,
        **each(CALLED, Raises("model has no layer to penalise")),
    },
}


EXPECTED["func_jvp"]["AccumulatedDREG called"] = Raises(
    "Nested forward mode AD is not supported", "take `grad` or `vjp`"
)
INDUCTOR = [  # the slow suite compiles these cells by inductor too
    ("compiled_model", "DREG attached"),
    ("whole_step", "DREG attached"),
    ("step", "fused + func.vjp"),
    ("step", "SpectReg graph"),
    ("whole_step", "DataGrad auto"),
]


def state_of(way: Way, thing: Thing) -> Raises | None:
    """What a cell raises, or None if it is exact."""
    found = [s for p, s in EXPECTED.get(way.key, {}).items() if fnmatchcase(thing.name, p)]
    assert len(found) < 2, f"{way.key}, {thing.name}: {len(found)} patterns say what it is"
    return found[0] if found else None


# ---- the page

HEAD = """# Ways of running × things

This page shows how each kind of call runs in each way of running. It is written by
`python tests/matrix_table.py docs/MATRIX.md` from a table whose every cell is checked by
`tests/test_matrix.py` (torch 2.13).

- ✓ means that the gradients of all parameters and of x equal those of the plain PyTorch reference
  in float64, to 1e-10. In float32 and under autocast they are at most twice as far from the float64
  gradients as those of plain PyTorch, run in the same way. Under `no_grad` and in inference mode
  there are no gradients, and the values are compared.
- A number means that the call raises an error, whose message is given below the table. No
  combination silently gives a wrong result.
- *GPU* means that the cell is tested on machines with a GPU only, and not on the machine that wrote
  this page.

The columns:

- *fused*: a model with fused activations (`fuse`, `fastjac.nn`, functions of fastjac) under penalty
  code of your own;
- *attached* and *called*: the two forms of the layer-wise penalties, `DREG(model)` and
  `DREG()(model, x)`;
- *graph*: `penalty(x, output)`;
- *auto*, *chain* and *autograd*: the engine of `penalty(model, x)`.

Cells that compile use the backend `aot_eager`. Some cells of {inductor}
are tested with inductor too.
"""


VERSIONS = """## Versions of PyTorch

`python -m pytest -m "not slow"` on a CPU, with fastjac built for PyTorch 2.13, at commit fc11b62:

| PyTorch | passed | failed | skipped |
| --- | --- | --- | --- |
{results}
The tests of what a version does otherwise are skipped in it (`tests/versions.py`):

| PyTorch | what it does otherwise than 2.13 |
| --- | --- |
"""
# (version, passed, failed, skipped)
RESULTS = (
    ("2.10.0", 7387, 0, 376),
    ("2.13.0", 7483, 0, 278),
    ("2.14.1", 7456, 0, 307),
)


def versions() -> str:
    results = "".join(row(*result) + "\n" for result in RESULTS)
    names = {OLD: "2.10", NEW: "2.14"}
    return VERSIONS.format(results=results) + "".join(
        row(names[d.version], d.what) + "\n" for d in DIFFERENCES
    )


def page() -> str:
    parts = [HEAD.format(inductor=", ".join(dict.fromkeys(f"*{name}*" for _, name in INDUCTOR)))]
    for group in dict.fromkeys(thing.group for thing in THINGS):
        things, notes = [t for t in THINGS if t.group == group], []
        parts.append(f"## {group}\n")
        parts.append(row("", *(t.name for t in things)))
        parts.append("|" + " --- |" * (len(things) + 1))
        for way in WAYS:
            cells = []
            for thing in things:
                state = state_of(way, thing)
                if state is not None and state not in notes:
                    notes.append(state)
                exact = "GPU" if way.gpu else "✓"
                cells.append(exact if state is None else f"[{notes.index(state) + 1}]")
            parts.append(row(f"{way.group}: {way.name}", *cells))
        parts.append("")
        for number, state in enumerate(notes, 1):
            note = f" ({state.note})" if state.note else ""
            parts.append(f"{number}. “{state.message}”{note}")
        parts.append("")
    return "\n".join([*parts, versions()])


def row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
