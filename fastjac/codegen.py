"""Translates the activation table to C++ and to Triton.

A dialect says how a literal, a call and a conditional are written; the rest of the translation
(which ``let`` values an expression needs, and in which order) is the same for both languages.
``setup.py`` runs this at build time. Only the standard library is imported, so torch does not have
to be installed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

FUNCTIONS = {"exp", "exp_neg", "expm1", "log1p", "sin", "cos", "abs", "tanh", "normcdf"}
# The number of parameters that a Triton kernel takes; fewer are padded with zeros. It is more than
# the table needs, so that an activation that somebody adds is still one row.
TRITON_PARAMS = 4
_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
_COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


@dataclass(frozen=True)
class Dialect:
    literal: Callable[[float], str]
    call: Callable[[str, list[str]], str]
    where: Callable[[str, str, str], str]
    divide: Callable[[str, str], str]


# Every C++ literal is cast to the compute type: 0.5 alone would make a float kernel use double. M
# has the functions (csrc/common/functions.h).
CPP = Dialect(
    literal=lambda value: f"T({value!r})",
    call=lambda name, args: f"M::{name}({', '.join(args)})",
    where=lambda condition, yes, no: f"math::where({condition}, {yes}, {no})",
    divide=lambda left, right: f"M::divide({left}, {right})",
)

# Every Triton literal has the dtype of z: two Python numbers in a `where` are converted to float32,
# and a float64 kernel would lose nine digits.
TRITON = Dialect(
    literal=lambda value: f"tl.full([], {value!r}, z.dtype)",
    call=lambda name, args: f"_math.{name}({', '.join(args)})",
    where=lambda condition, yes, no: f"tl.where({condition}, {yes}, {no})",
    divide=lambda left, right: f"({left} / {right})",
)


def translate(expression: str, dialect: Dialect, names: set[str]) -> str:
    """Translate an expression of the table; raises ValueError if it uses an unknown construct."""

    def visit(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=int() | float() as value):
                return dialect.literal(float(value))
            case ast.Name(id=name) if name in names:
                return name
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return dialect.literal(-float(value))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return f"(-{visit(operand)})"
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return f"({visit(left)} {_ARITHMETIC[type(op)]} {visit(right)})"
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return dialect.divide(visit(left), visit(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                return f"({visit(left)} {_COMPARISONS[type(op)]} {visit(right)})"
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return dialect.where(visit(test), visit(body), visit(orelse))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                return dialect.call(name, [visit(arg) for arg in args])
        raise ValueError(
            f"the activation table has {ast.unparse(node)!r}, which cannot be translated: the"
            " docstring of fastjac/activations.py lists what an expression may contain"
        )

    return visit(ast.parse(expression.strip(), mode="eval").body)


def _names(expression: str) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(expression.strip())) if isinstance(n, ast.Name)}


def statements(row: Any, order: int, dialect: Dialect) -> Iterator[tuple[str, str]]:
    """``(name, expression)`` of the ``let`` values that φ^(order) needs, then ``("", result)``."""
    needed = _names(row.derivatives[order])
    for name, expression in reversed(list(row.let.items())):
        if name in needed:
            needed |= _names(expression)
    scope = {"z", *row.params}
    for name, expression in row.let.items():
        if name in needed:
            yield name, translate(expression, dialect, scope)
            scope.add(name)
    yield "", translate(row.derivatives[order], dialect, scope)


def cpp_headers(table: Sequence[Any], table_hash: str) -> dict[str, str]:
    """The generated C++ headers by file name."""
    return {
        "activations.h": _functors(table, table_hash),
        "param_counts.h": _param_counts(table),
    }


def _param_counts(table: Sequence[Any]) -> str:
    counts = [len(row.params) for row in table]
    return "\n".join(
        (
            "// Generated from fastjac/activations.py by fastjac/codegen.py. Do not edit.",
            "#pragma once",
            "",
            "namespace fastjac {",
            "",
            "// The number of parameters of each activation, and the largest of these numbers.",
            f"constexpr int param_counts[] = {{{', '.join(map(str, counts))}}};",
            f"constexpr int max_params = {max(1, *counts)};",
            "",
            "}  // namespace fastjac",
            "",
        )
    )


def _functors(table: Sequence[Any], table_hash: str) -> str:
    """The functors, for example ``fastjac::Gelu::d<K>(z, params)``, and the switch over them."""
    out = [
        "// Generated from fastjac/activations.py by fastjac/codegen.py. Do not edit.",
        "#pragma once",
        '#include "functions.h"',
        '#include "params.h"',
        "",
        f'#define FASTJAC_TABLE_HASH "{table_hash}"',
        "",
        "namespace fastjac {",
    ]
    for row in table:
        zeros = ", ".join(str(row.has_zeros(k)).lower() for k in range(len(row.derivatives)))
        out += [
            "",
            f"struct {camel(row.name)} {{",
            f"  static constexpr int zero_from = {row.zero_from};",
            f"  static constexpr bool has_zeros[] = {{{zeros}}};",
            "  template <int K, class M = math::Exact, class T>",
            "  FASTJAC_HD static T d([[maybe_unused]] T z,"
            " [[maybe_unused]] const Params<T>& params) {",
            *(
                f"    [[maybe_unused]] const T {name} = params.at[{i}];"
                for i, name in enumerate(row.params)
            ),
        ]
        for order in range(len(row.derivatives)):
            out.append(f"    {'if' if order == 0 else '} else if'} constexpr (K == {order}) {{")
            for name, expression in statements(row, order, CPP):
                out.append(f"      const T {name} = {expression};" if name else
                           f"      return {expression};")  # fmt: skip
        out += [
            "    }",
            "  }",
            "  // d<K>(z) * g; zero where the derivative is zero, even if g is inf or NaN.",
            "  template <int K, class M = math::Exact, class T>",
            "  FASTJAC_HD static T times([[maybe_unused]] T z, [[maybe_unused]] T g,"
            " [[maybe_unused]] const Params<T>& params) {",
            "    if constexpr (K >= zero_from) {",
            "      return T(0);",
            "    } else if constexpr (has_zeros[K]) {",
            "      const T slope = d<K, M>(z, params);",
            "      return math::where(slope == T(0), T(0), slope * g);",
            "    } else {",
            "      return d<K, M>(z, params) * g;",
            "    }",
            "  }",
            "};",
        ]
    out += [
        "",
        "// Calls visitor(Functor{}) for the activation with this id.",
        "template <class Visitor>",
        "void visit_activation(int64_t id, Visitor&& visitor) {",
        "  switch (id) {",
    ]
    for index, row in enumerate(table):
        out.append(f"    case {index}: visitor({camel(row.name)}{{}}); return;")
    out += ["  }", "}", "", "}  // namespace fastjac", ""]
    return "\n".join(out)


def triton_module(table: Sequence[Any]) -> str:
    """The Triton function ``phi(z, p0, …, FN, K)``; FN is the index of the row, K the order.

    The parameters of a row are run-time arguments: a slope that follows a schedule must not compile
    a kernel in each step.
    """
    for row in table:
        if len(row.params) > TRITON_PARAMS:
            raise ValueError(
                f"activation {row.name!r} has {len(row.params)} parameters, and the kernels in"
                f" fastjac/kernels take {TRITON_PARAMS}: add one to the kernels of act and"
                " act_stats, and to TRITON_PARAMS in fastjac/codegen.py"
            )
    values = ", ".join(f"p{i}" for i in range(TRITON_PARAMS))
    out = [
        '"""Generated from fastjac/activations.py by fastjac/codegen.py. Do not edit."""',
        "",
        "# ruff: noqa",
        "import triton",
        "import triton.language as tl",
        "",
        "from fastjac.kernels import math as _math",
        "",
        "",
        "@triton.jit",
        f"def phi(z, {values}, FN: tl.constexpr, K: tl.constexpr):",
    ]
    for index, row in enumerate(table):
        out.append(f"    {'if' if index == 0 else 'elif'} FN == {index}:  # {row.name}")
        for place, parameter in enumerate(row.params):
            out.append(f"        {parameter} = tl.full([], p{place}, z.dtype)")
        for order in range(len(row.derivatives)):
            out.append(f"        {'if' if order == 0 else 'elif'} K == {order}:")
            for name, expression in statements(row, order, TRITON):
                out.append(f"            {name or 'd'} = {expression}")
    out += ["    return d", ""]
    return "\n".join(out)


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
