"""Diagnoses of networks with BatchNorm and Dropout: `bnext.doctor`; see ``docs/doctor.md``."""

from bnext.diagnosis._doctor import doctor
from bnext.diagnosis.report import Finding, Report
from bnext.diagnosis.rules import RULES, Rule

__all__ = ["RULES", "Finding", "Report", "Rule", "doctor"]
