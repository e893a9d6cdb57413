"""The one flow: check, plan, calibrate, quantize, write, verify, measure."""
