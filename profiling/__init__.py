"""Measuring: ahead-of-time facts (`aot`) and the counts that must not grow (`counts`), the speed of
models (`speed`) and of rooms (`kernel_speed`), `report` and `compare` on what they found, `suite`,
the schedule over them, and where a step's time goes (`nsys`, `train_profile`). May import
everything; nothing imports it but `nvtx`, the named ranges.
"""
