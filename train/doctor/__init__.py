"""The training doctor: what a training shows is recorded, rules read the record and say what goes
wrong, with evidence and a remedy. It watches; it changes nothing."""
