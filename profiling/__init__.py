"""Measuring: ahead-of-time facts (`aot`) and the counts that must not grow (`counts`), the speed of
models (`speed`) and of rooms (`kernel_speed`), `report` and `compare` on what they found, and
`suite`, the schedule over them. May import everything; nothing imports it.
"""
