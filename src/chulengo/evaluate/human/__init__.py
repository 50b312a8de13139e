"""Ratings by people: blind sheets that are handed out, and what can be said from what comes back.

study.py decides who sees what · outputs.py reads the answers · sheets.py writes the files, cells.py guards their
texts · ratings.py reads them back · win_rate.py, bradley_terry.py, agreement.py, raters.py, criteria.py count ·
summary.py puts it together. Intervals other than Wilson's come from the package's one bootstrap (evaluate/scoring.py),
which draws items: votes on one item are alike. They do not hold other raters: with three people they speak of these.
"""
