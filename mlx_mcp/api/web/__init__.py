"""What the faces over plain HTTP have in common: endpoints, their requests, answers, streams and errors."""
