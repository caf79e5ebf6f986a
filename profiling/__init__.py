"""Measuring: ahead-of-time facts (`aot`), the speed of models (`speed`) and of rooms
(`kernel_speed`), and `suite`, the schedule over them. May import everything; nothing imports it.
"""
