"""What TF32 and bfloat16 change in updates of SOAP, by `precision.compare`."""

from __future__ import annotations

from precision import RULES, VARIANTS, compare

from gpu.record import Record


def run(record: Record) -> None:
    """Record a row for each rule and variant, as far as the time goes."""
    rows = record.figures["rows"] = []
    sizes = (((24, 16),), 9) if record.tiny else ()
    spent = 0.0
    for rule in RULES:
        for variant in VARIANTS:
            if record.fits(f"{rule}: {variant.name}", spent):
                start = record.clock()
                rows.append(compare(variant, rule, record.device, *sizes))
                spent = record.clock() - start
                record.write()
