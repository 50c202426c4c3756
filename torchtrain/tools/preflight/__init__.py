"""What a run takes, known before it starts: memory, time, money, and the layout that suits it."""
