"""The report of a training: one page, its charts, and the numbers behind them."""
