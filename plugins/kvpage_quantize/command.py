"""``kvpage quantize``: from a checkpoint to a smaller one. Nothing heavy is imported before the flags are read."""

from __future__ import annotations

import argparse
import logging
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpage.flags.engine import add_model_argument, chosen_model
from kvpage.flags.parser import CommandParser, UsageError, check_at_least, human_integer
from kvpage_quantize.output import check_output, copy_companions, output_folder, write_config, write_json
from kvpage_quantize.settings import (
    GPTQ_BITS,
    METHODS,
    USUAL_SAMPLES,
    WHOLE_ROW,
    AwqSettings,
    CalibrationSettings,
    GptqSettings,
)

if TYPE_CHECKING:
    from kvpage_quantize.packed import Packed
    from kvpage_quantize.report import Report, StepBar
    from kvpage_quantize.source import Source

LOG = logging.getLogger("kvpage.quantize")
DESCRIPTION = """\
Write a quantized checkpoint that kvpage and other engines load.

  int8   W8A8, compressed-tensors: a scale an output, activations int8 a token at a time; needs nothing more
  fp8    the same with float8_e4m3fn
  gptq   2, 3, 4 or 8 bit weights by auto-gptq's solver; pip install 'kvpage[gptq]' (Python 3.10 and 3.11)
  awq    4 bit weights by autoawq; pip install 'kvpage[awq]'

gptq and awq run the model on calibration text: a file's, or text that is generated."""

OF_METHODS = {
    "bits": ("gptq",),
    "group_size": ("gptq", "awq"),
    "desc_act": ("gptq",),
    "sym": ("gptq",),
    "damp_percent": ("gptq",),
    "calibration": ("gptq", "awq"),
    "calibration_samples": ("gptq", "awq"),
    "sequence_length": ("gptq", "awq"),
    "seed": ("gptq", "awq"),
}
"""Flags that not every method has."""


def run(arguments: list[str]) -> int:
    """The command; its exit status.

    Raises:
        KvpageError: the flags make no sense, something that the method needs is missing, or the model cannot be
            quantized. Nothing is written then.
    """
    namespace = make_parser().parse_arguments(arguments)
    _refuse_flags_of_others(namespace)
    _check_values(namespace)
    from kvpage_quantize.report import StepBar
    from kvpage_quantize.source import open_source

    source = open_source(chosen_model(namespace), revision=namespace.revision)
    check_output(namespace.out, source.folder, force=namespace.force)
    with StepBar() as bar, output_folder(namespace.out) as folder:
        report = _write(source, namespace, folder, bar)
    if namespace.report is not None:
        write_json(namespace.report, report.to_dict())
    print(report.to_text())
    share = report.bytes_after / report.bytes_before
    print(
        f"\n{namespace.out}: {report.bytes_after / 1e6:,.1f} MB of {report.bytes_before / 1e6:,.1f} MB ({share:.0%})"
    )
    print(f'try: kvpage generate --model {shlex.quote(str(namespace.out))} "What is a KV cache?"')
    return 0


def make_parser() -> CommandParser:
    """The flags of the command."""
    parser = CommandParser("kvpage quantize", DESCRIPTION, "[MODEL] --method METHOD --out DIR")
    add_model_argument(parser)
    parser.add_argument("--method", choices=METHODS, required=True, help=", ".join(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint that is in it")
    parser.add_argument("--revision", metavar="NAME", help="of a model on the hub: branch, tag or commit")
    parser.add_argument("--report", type=Path, metavar="FILE", help="the error of each layer, as JSON")
    format_ = parser.add_argument_group("the format (gptq; awq has a group size only)")
    format_.add_argument("--bits", type=int, metavar="N", help="bits of a weight: 2, 3, 4, 8 [4]")
    format_.add_argument("--group-size", type=int, metavar="N", help="inputs that share a scale; -1 = all (gptq) [128]")  # fmt: skip
    format_.add_argument("--desc-act", action=argparse.BooleanOptionalAction, help="quantize inputs by falling activation (act-order) [no]")  # fmt: skip
    format_.add_argument("--sym", action=argparse.BooleanOptionalAction, help="symmetric, without zero points [yes]")  # fmt: skip
    format_.add_argument("--damp-percent", type=float, metavar="SHARE", help="of the Hessian's mean diagonal, added to it [0.01]")  # fmt: skip
    text = parser.add_argument_group("calibration text (gptq, awq)")
    text.add_argument("--calibration", type=Path, metavar="FILE", help='text with blank lines between documents, or .jsonl with "text" [generated]')  # fmt: skip
    text.add_argument(
        "--calibration-samples", type=human_integer, metavar="N", help="sequences [gptq: 128, awq: 64]"
    )
    text.add_argument("--sequence-length", type=human_integer, metavar="N", help="tokens of each [512]")
    text.add_argument("--seed", type=human_integer, metavar="N", help="of generated text, and of the order of a file's documents [0]")  # fmt: skip
    return parser


def gptq_settings(namespace: argparse.Namespace) -> GptqSettings:
    """What was typed, over the defaults."""
    return GptqSettings(**_given(namespace, "bits", "group_size", "desc_act", "sym", "damp_percent"))


def awq_settings(namespace: argparse.Namespace) -> AwqSettings:
    """What was typed, over the defaults."""
    return AwqSettings(**_given(namespace, "group_size"))


def calibration_settings(namespace: argparse.Namespace) -> CalibrationSettings:
    """What was typed, over the defaults."""
    given = _given(namespace, "calibration", "calibration_samples", "sequence_length", "seed")
    given.setdefault("calibration_samples", USUAL_SAMPLES[namespace.method])
    names = {"calibration": "file", "calibration_samples": "samples", "sequence_length": "length"}
    return CalibrationSettings(**{names.get(flag, flag): value for flag, value in given.items()})


def _write(source: Source, namespace: argparse.Namespace, folder: Path, bar: StepBar) -> Report:
    """Quantize ``source`` into ``folder``."""
    from kvpage_quantize.channel_formats import FORMATS, channel_config, channel_pieces
    from kvpage_quantize.packed import PLAIN_DTYPE, packed_pieces
    from kvpage_quantize.report import LayerError, Report
    from kvpage_quantize.safetensors_files import piece_of, write_safetensors

    errors: list[LayerError]
    settings: dict[str, Any] = {}
    dtype = None
    if namespace.method in FORMATS:
        chosen, errors = FORMATS[namespace.method], []
        pieces = list(channel_pieces(source, chosen, errors))
        config = channel_config(source, chosen)
    else:
        packed, settings = _packed(source, namespace, bar)
        pieces = list(packed_pieces(source, packed))
        config, errors, dtype = packed.config, packed.errors, PLAIN_DTYPE
    task = bar.begin(f"{namespace.method}: tensors", len(pieces))
    after = write_safetensors(folder, pieces, written=lambda piece: bar.advance(task))
    copy_companions(source.folder, folder)
    write_config(folder, source.config, config, dtype)
    if namespace.method == "gptq":  # where older readers look for it
        write_json(folder / "quantize_config.json", config)
    before = sum(piece_of({name: source.view.read(name)}).nbytes for name in source.view.names())
    return Report(
        model=source.name,
        method=namespace.method,
        settings=settings,
        bytes_before=before,
        bytes_after=after,
        layers=errors,
    )


def _packed(source: Source, namespace: argparse.Namespace, bar: StepBar) -> tuple[Packed, dict[str, Any]]:
    """The outcome of gptq or awq, and its settings for the report."""
    from kvpage_quantize.calibration import calibration_tokens

    text = calibration_settings(namespace)
    settings: GptqSettings | AwqSettings
    if namespace.method == "gptq":
        from kvpage_quantize.gptq import quantize_gptq
        from kvpage_quantize.gptq_package import load_package

        gptq, settings = load_package(), gptq_settings(namespace)
        packed = quantize_gptq(source, settings, calibration_tokens(source, text), gptq, bar)
    else:
        from kvpage_quantize import awq

        package, settings = awq.load_package(), awq_settings(namespace)
        packed = awq.quantize_awq(source, settings, calibration_tokens(source, text), package, bar)
    file = None if text.file is None else str(text.file)
    return packed, {**asdict(settings), "calibration": {**asdict(text), "file": file}}


def _refuse_flags_of_others(namespace: argparse.Namespace) -> None:
    """Raises UsageError where a flag was typed that the method does not have: it would change nothing."""
    for name, methods in OF_METHODS.items():
        if getattr(namespace, name) is not None and namespace.method not in methods:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is of {' and '.join(methods)}; --method {namespace.method} has none: leave it out")  # fmt: skip


def _check_values(namespace: argparse.Namespace) -> None:
    """Raises UsageError where a value is out of its range."""
    if namespace.bits is not None and namespace.bits not in GPTQ_BITS:
        raise UsageError(f"--bits must be one of {', '.join(map(str, GPTQ_BITS))}, got {namespace.bits}")
    size = namespace.group_size
    if size is not None and size < 1 and not (size == WHOLE_ROW and namespace.method == "gptq"):
        also = ", or -1 for a whole row" if namespace.method == "gptq" else ""
        raise UsageError(f"--group-size must be at least 1{also}, got {size}")
    if namespace.damp_percent is not None and not 0 < namespace.damp_percent < 1:
        raise UsageError(f"--damp-percent must be between 0 and 1, got {namespace.damp_percent:g}")
    for name, lowest in (("calibration_samples", 1), ("sequence_length", 1), ("seed", 0)):
        if getattr(namespace, name) is not None:
            check_at_least(lowest, namespace, name)


def _given(namespace: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The values of those flags that were typed."""
    return {name: getattr(namespace, name) for name in names if getattr(namespace, name) is not None}
