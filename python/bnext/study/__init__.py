"""When do Batch Normalization and Dropout help? Answered by measurement: ``bnext study``."""
