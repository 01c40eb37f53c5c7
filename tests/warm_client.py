"""In place of `python WORDS`: the server at the socket that the first argument names runs it, see warm_server.py."""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)]
ignored = [int(number) for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
request = {"program": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}
request |= {"blocked": blocked, "ignored": ignored}
socket.send_fds(server, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
for number in PASSED_ON:
    signal.signal(number, lambda number, _: server.send(bytes([number])))
signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
code = int(server.recv(100) or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
