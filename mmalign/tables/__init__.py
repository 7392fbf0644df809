"""The papers' tables with your own rows in them: layout, own results, formats, comparison, leaderboard page, exports."""
