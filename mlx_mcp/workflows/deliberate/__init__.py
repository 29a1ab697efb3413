"""One question to several branches over one context, and one answer out of theirs."""
