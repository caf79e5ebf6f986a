"""How often the doctor is right: trainings with a fault and sound ones, by the hundred."""
