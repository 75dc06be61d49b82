"""What ``benchmarks/cpu.py`` is made of: workloads, one worker process an engine, the machine's bounds, the report."""
