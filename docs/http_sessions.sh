# The address of `mlx-mcp serve --http`, and its token if it has one.
SERVER=${SERVER:-http://127.0.0.1:8080}
ask() { curl -sS --fail-with-body -H "authorization: Bearer $TOKEN" -H 'content-type: application/json' "$@"; echo; }

# A context is computed once, and has a name.
ask $SERVER/v1/sessions -d '{"name": "codes", "system": "The code of Rex is 4096. The code of Ada is 1815."}'
# → {"name": "codes", "model": "embedded", "cached_tokens": 0}

# Two sessions go on from it. With a key the call can be repeated: whoever lost the answer gets the same two.
ask $SERVER/v1/sessions/codes/fork -H 'Idempotency-Key: forks-1' -d '{"names": ["left", "right"]}'
# → {"names": ["left", "right"]}

# A turn of one of them: the context is not computed again.
ask $SERVER/v1/sessions/left/generate -d '{"prompt": "What is the code of Ada?"}'
# → {"text": "1815", "finish_reason": "stop"}

# A turn of the other, as a stream of events. The last one has the whole answer.
ask -N $SERVER/v1/sessions/right/generate -d '{"prompt": "What is the code of Rex?", "stream": true}'
# → {"type": "result"}

# Many prompts over one context, at once.
ask $SERVER/v1/batch -d '{"session": "codes", "prompts": ["What is the code of Rex?", "What is the code of Ada?"]}'
# → {"model": "embedded"}

# A call that may take long: it is answered at once, and its result is fetched when it is there.
ask $SERVER/v1/batch -d '{"session": "codes", "prompts": ["What is the code of Rex?"], "wait_s": 0}'
# → {"status": "running"}

# What there is now, and an end.
ask "$SERVER/v1/sessions?limit=10"
ask -X DELETE $SERVER/v1/sessions/codes
