"""What attention costs and how fast it could be: FLOPs and bytes from who sees whom, what this machine does at best,
and predictions held against measurements.

The front of the package may be imported here, and no backend; `tools` may not.
"""
