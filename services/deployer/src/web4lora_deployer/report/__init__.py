"""The reports of a test: for people, for programs, and as a picture that draw.io edits."""

from web4lora_deployer.report.facts import (
    Comparison,
    Difference,
    Measured,
    ReportFacts,
    Sample,
    ServedModel,
    SpeedLimit,
    VerifySummary,
)
from web4lora_deployer.report.write import write_reports

__all__ = [
    "Comparison",
    "Difference",
    "Measured",
    "ReportFacts",
    "Sample",
    "ServedModel",
    "SpeedLimit",
    "VerifySummary",
    "write_reports",
]
