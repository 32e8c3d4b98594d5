"""Settings, label maps, the error tree and log set-up; imports nothing else of ours."""
