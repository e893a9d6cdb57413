"""Where samples come from: one file a source, and their mixing."""
