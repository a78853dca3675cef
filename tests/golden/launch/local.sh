#!/bin/bash
port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
NOTE='it'"'"'s $5' JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 tcjax train configs/boards.py &
NOTE='it'"'"'s $5' JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 tcjax train configs/boards.py &
wait
