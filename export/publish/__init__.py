"""What people see of an exported directory: report page, model card, upload to the Hub.

What happens here: `facts.py` reads manifest and files into one value; report, card and upload show
it and measure nothing themselves. What it must not know: how scales were found, how a run went.
"""
