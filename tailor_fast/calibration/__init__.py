"""Running a model over data: lanes in lockstep, moments of layer inputs, statistics files."""

from tailor_fast.calibration.job import CalibrationReport, calibrate
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.prepared import save_batches

__all__ = ["CalibrationReport", "RunOptions", "calibrate", "save_batches"]
