"""Which layers stay attention, and how a teacher's weights become a student's."""
