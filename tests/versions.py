"""What other versions of torch than 2.13 do otherwise, and the tests that it concerns.

These tests are skipped in such a version. `matrix_table.py` makes a table of the list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.torch_version import TorchVersion

TORCH = TorchVersion(torch.__version__)
OLD, NEW = "2.10", "2.14"  # the suite was run on these, besides 2.13


class Difference(NamedTuple):
    version: str  # `OLD` and the versions before 2.13, or `NEW` and later ones
    what: str
    tests: tuple[str, ...]  # beginnings of the ids of tests, ``module::test[parameters]``

    @property
    def here(self) -> bool:
        return TORCH < "2.13" if self.version == OLD else TORCH >= NEW


DIFFERENCES = [
    Difference(
        OLD,
        "`torch.compile` does not trace `loss.backward()`. Compile a function that returns the "
        "loss.",
        (
            "test_fastjac_compile::test_arguments_of_all_kinds",
            "test_fastjac_compile::test_compilations",
            "test_fastjac_compile::test_a_weight_that_requires_grad",
            *(f"test_fastjac_compile::test_steps[{kind}-True]" for kind in ("DREG", "SpectReg")),
            *(
                f"test_fastjac_compile::test_what_torch_compiles_by_a_setting[{case}-True]"
                for case in ("checkpointed-DREG", "checkpointed-SpectReg", "Recurrent-SpectReg")
            ),
            *(
                f"test_fastjac_compile::test_wrong_code_is_refused[{change}-True"
                for change in ("buffer", "last", "value")
            ),
            "test_bench_gate::test_the_compiled_forms_are_one_graph_and_right[ours_compiled",
            "test_bench_gate::test_the_compiled_forms_are_one_graph_and_right[compiled-datagrad",
            "test_bench_registry::test_host_cases_are_tiny",
            "test_bench_registry::test_engines_are_for_input_jacobians",
            "test_matrix::test_cell[fastjac_step-fused + autograd.grad",
            "test_matrix::test_cell[whole_step",
            "test_matrix::test_planted_fault_is_seen[without_graph-whole_step",
        ),
    ),
    Difference(
        OLD,
        "`make_fx` does not trace `generator=`, and fixes the batch size of several cotangents "
        "through LayerNorm.",
        (
            *(
                f"test_make_fx::test_every_form_of_every_penalty[{name}-"
                for name in ("spectreg", "random_onehot", "jacobian_reg", "accumulated_dreg-module")
            ),
            "test_make_fx::test_presets",
            "test_make_fx::test_several_cotangents[<lambda>",
        ),
    ),
    Difference(
        OLD,
        "`F.grid_sample` has no second derivative, and `torch.aminmax` none.",
        (
            "test_sweep::test_case[F.grid_sample",
            "test_sweep::test_all_cells[F.grid_sample",
            "test_sweep::test_alone[F.grid_sample",
            "test_sweep::test_case[torch.aminmax",
            "test_sweep::test_all_cells[torch.aminmax",
            "test_sweep::test_alone[torch.aminmax",
            "test_chain_rows::test_operation_without_a_row[grid_sample",
        ),
    ),
    Difference(
        OLD,
        "`torch.func.vjp` in inference mode returns 0, also of a model of PyTorch alone.",
        ("test_matrix::test_cell[inference_mode-fused + func.vjp",),
    ),
    Difference(
        OLD,
        "AccumulatedDREG inside a checkpoint raises another error.",
        ("test_matrix::test_cell[checkpointed-AccumulatedDREG called",),
    ),
    Difference(
        NEW,
        "Several cotangents through GroupNorm are right, so fastjac computes them at once.",
        (
            "test_torch_wrong::test_group_norm_of_several_cotangents[",
            "test_torch_wrong::test_group_norm_of_several_cotangents_raises",
            "test_sweep::test_planted_fault_is_seen[no_guards-GroupNorm",
        ),
    ),
    Difference(
        NEW,
        "The third derivatives of BatchNorm and InstanceNorm in training mode raise an error, "
        "instead of being wrong.",
        (
            *(
                f"test_torch_wrong::test_gradient_of_a_derivative[{name}-{way}"
                for name in ("batch_norm", "instance_norm")
                for way in ("double vjp", "second")
            ),
            "test_sweep::test_torch_raises_too[gradient_of_batch_norm]",
        ),
    ),
    Difference(
        NEW,
        "`torch.cdist` has a second derivative for one cotangent, but not for several at once.",
        (
            "test_sweep::test_case[torch.cdist",
            "test_sweep::test_all_cells[torch.cdist",
            "test_sweep::test_torch_raises_too[torch.cdist",
        ),
    ),
    Difference(
        NEW,
        "The flash kernel of attention on a CPU takes tensors without a dimension of heads. In the "
        "graph form this raises the error of other attention.",
        (
            "test_sweep::test_case[F.scaled_dot_product_attention(a, a.sin(), a)",
            "test_sweep::test_all_cells[F.scaled_dot_product_attention(a, a.sin(), a)",
            "test_sweep::test_alone[F.scaled_dot_product_attention(a, a.sin(), a)",
        ),
    ),
]


def differs(nodeid: str) -> str | None:
    """What this version of torch does otherwise in a test; None if nothing."""
    name = nodeid.rpartition("/")[2].replace(".py::", "::")
    for difference in DIFFERENCES:
        if difference.here and name.startswith(difference.tests):
            return f"torch {torch.__version__}: {difference.what}"
    return None
