"""Measuring: ahead-of-time facts (`aot`), the speed of models (`speed`) and of rooms
(`kernel_speed`), `suite`, the schedule over them, and where a step's time goes (`nsys`,
`train_profile`). May import everything; nothing imports it but `nvtx`, the named ranges.
"""
