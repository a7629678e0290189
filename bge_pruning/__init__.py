"""Structured pruning of BGE-M3 with learned gates, on MosaicML Composer."""
