"""The reports of a test: for people, for programs, and as a picture that draw.io edits."""

from web4lora_deployer.report.facts import Measured, ReportFacts, Sample, ServedModel, VerifySummary
from web4lora_deployer.report.write import write_reports

__all__ = ["Measured", "ReportFacts", "Sample", "ServedModel", "VerifySummary", "write_reports"]
