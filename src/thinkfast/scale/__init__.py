"""Many answers a problem: drawing, grading, voting, estimating and comparing them against measured time."""
