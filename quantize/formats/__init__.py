"""One file a quantization format."""
