# What up, down and node share. STATE holds what belongs to the cluster; it must not lie in /tmp, which nodes have privately.
STATE=${LUMOS_LOCAL_STATE:-/var/tmp/lumos-local}
BRIDGE=lumos0
NETWORK=10.77.0 # of the nodes; .1 is this machine, .2 the store, .11 and on are nodes
PREFIX=lumos-

fail() {
    echo "error: $*" >&2
    exit 1
}

check_rights() {
    command -v ip >/dev/null || fail "there is no \`ip\`: install iproute2"
    ip netns add "${PREFIX}try" 2>/dev/null ||
        fail "network namespaces cannot be made here (ip netns add): run as root, in a container with CAP_SYS_ADMIN"
    ip netns delete "${PREFIX}try"
    unshare --mount true 2>/dev/null || fail "mounts cannot be private here (unshare --mount): run as root"
}

address() { echo "$NETWORK.$((10 + $1))"; }

# A namespace with an address, reached over the bridge.
make_namespace() {
    local name=$PREFIX$1
    ip netns add "$name"
    ip link add "lumos-v$1" type veth peer name eth0 netns "$name"
    ip link set "lumos-v$1" master "$BRIDGE" up
    ip -n "$name" address add "$2/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
    ip -n "$name" route add default via "$NETWORK.1"
    mkdir -p "$STATE/$1/tmp"
    chmod 1777 "$STATE/$1/tmp"
}

# NAME=VALUE of all that a node's processes are given.
node_environment() {
    if [ -e "$STATE/store" ]; then
        echo "AWS_ENDPOINT_URL=http://$NETWORK.2:5000"
        echo "AWS_ACCESS_KEY_ID=local"
        echo "AWS_SECRET_ACCESS_KEY=local-secret"
        echo "AWS_REGION=us-east-1"
        echo "MLFLOW_TRACKING_URI=http://$NETWORK.2:5001"
        echo "MLFLOW_TRACKING_USERNAME=local"
        echo "MLFLOW_TRACKING_PASSWORD=local-password"
    fi
    grep . "$STATE/extra" || true
}

# What becomes a node of a namespace: a /tmp, a /dev/shm and processes that no other node sees. Without the last a driver
# of Ray would find the raylets of all nodes, and take that of the head for the one of its own machine.
inside() {
    local name=$1
    shift
    # shellcheck disable=SC2016
    ip netns exec "$PREFIX$name" unshare --mount --pid --fork --kill-child --mount-proc --propagation private bash -c '
        mount --bind "$1/tmp" /tmp && mount -t tmpfs -o size=2g shm /dev/shm && cd /tmp && shift && { "$@" & wait $!; }' \
        inside "$STATE/$name" env "${NODE_VARIABLES[@]}" "$@"
}
NODE_VARIABLES=(TMPDIR=/tmp LUMOS_CACHE=/tmp/lumos-cache RAY_AUTH_MODE=token "RAY_AUTH_TOKEN_PATH=$STATE/token"
    RAY_USAGE_STATS_ENABLED=0)

# The process, as this machine counts them, that the others of a node descend from.
first_process() {
    local pid here
    here=$(readlink /proc/self/ns/pid)
    for pid in $(ip netns pids "$PREFIX$1"); do
        [ "$(readlink "/proc/$pid/ns/pid")" = "$here" ] || { echo "$pid" && return; }
    done
    fail "node $1 has no processes: infra/cluster/local/node $1 start"
}

start_node() {
    local number=$1 place assigned
    mapfile -t assigned < <(node_environment)
    if [ "$number" = 1 ]; then
        place=(--head --port 6379 --dashboard-host 0.0.0.0 --dashboard-port 8265)
    else
        place=(--address "$(address 1):6379")
    fi
    inside "$number" env "${assigned[@]+"${assigned[@]}"}" \
        setsid nohup ray start "${place[@]}" --block --node-ip-address "$(address "$number")" \
        --num-cpus "$(cat "$STATE/cpus")" --object-store-memory 400000000 --temp-dir /tmp/ray \
        --resources "{\"node$number\": 1000}" >>"$STATE/$number/log" 2>&1 </dev/null &
}

# Until Ray says that a node has joined. It gives itself 30 s for that, too few where the machine is busy: then again.
wait_for_node() {
    local end=$((SECONDS + 240)) log=$STATE/$1/log
    while [ $SECONDS -lt $end ]; do
        ! grep -q "Ray runtime started" "$log" 2>/dev/null || return 0
        if grep -q "node timed out during startup" "$log" 2>/dev/null; then
            mv "$log" "$log.$SECONDS"
            start_node "$1"
        fi
        sleep 0.3
    done
    tail -n 20 "$log" >&2
    fail "node $1 did not come up; the end of its log is above"
}

# PostgreSQL where it is installed, as for a team; a file of SQLite else. Sets DATABASE.
start_database() {
    local programs data=$STATE/store/postgres
    programs=$(find /usr/lib/postgresql -path '*/bin/initdb' 2>/dev/null | sort -V | tail -n 1 || true)
    DATABASE=sqlite:////tmp/mlflow.db
    [ -n "$programs" ] && id postgres >/dev/null 2>&1 || return 0
    programs=$(dirname "$programs") # not on PATH on Debian
    install -d -o postgres -m 700 "$data"
    local log=$STATE/store/postgres.log
    as_postgres() { inside store runuser -u postgres -- "$@" </dev/null >>"$log" 2>&1; }
    as_postgres "$programs/initdb" --auth trust --no-sync --encoding UTF8 -D "$data/files" || true
    inside store runuser -u postgres -- setsid nohup "$programs/postgres" -D "$data/files" -k "$data" \
        -c listen_addresses= -c fsync=off >>"$log" 2>&1 </dev/null &
    for _ in $(seq 100); do
        ! as_postgres "$programs/createdb" -h "$data" mlflow || break
        sleep 0.3
    done
    as_postgres "$programs/psql" -h "$data" -c "" mlflow || {
        tail -n 20 "$log" >&2
        fail "PostgreSQL does not answer; the end of its log is above"
    }
    chmod 711 "$data"
    DATABASE="postgresql:///mlflow?host=$data&user=postgres"
}

start_mlflow() {
    printf '%s\n' '[mlflow]' default_permission=READ "database_uri=$DATABASE" \
        "authorization_function=mlflow.server.auth:authenticate_request_basic_auth" >"$STATE/store/basic_auth.ini"
    inside store env AWS_ENDPOINT_URL="http://$NETWORK.2:5000" AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local-secret \
        MLFLOW_S3_ENDPOINT_URL="http://$NETWORK.2:5000" MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
        MLFLOW_AUTH_CONFIG_PATH="$STATE/store/basic_auth.ini" MLFLOW_AUTH_ADMIN_USERNAME=local \
        MLFLOW_AUTH_ADMIN_PASSWORD=local-password MLFLOW_FLASK_SERVER_SECRET_KEY="$(head -c 16 /dev/urandom | od -An -tx1)" \
        setsid nohup mlflow server --app-name basic-auth --host "$NETWORK.2" --port 5001 --workers 1 --serve-artifacts \
        --allowed-hosts "$NETWORK.2:5001" --artifacts-destination s3://mlflow/artifacts --backend-store-uri "$DATABASE" \
        >>"$STATE/store/mlflow.log" 2>&1 </dev/null &
}

start_store() {
    mkdir -p "$STATE/store/mlflow"
    inside store setsid nohup moto_server -H "$NETWORK.2" -p 5000 >>"$STATE/store/s3.log" 2>&1 </dev/null &
    for _ in $(seq 200); do
        curl -fsS -m 2 "http://$NETWORK.2:5000/" >/dev/null 2>&1 && break
        sleep 0.2
    done
    for bucket in lumos mlflow; do
        curl -fsS -X PUT "http://$NETWORK.2:5000/$bucket" >/dev/null || {
            tail -n 20 "$STATE/store/s3.log" >&2
            fail "the S3 server does not answer; the end of its log is above"
        }
    done
    start_database
    start_mlflow
    for _ in $(seq 500); do # it imports for long, twice
        curl -fsS -m 2 "http://$NETWORK.2:5001/health" >/dev/null 2>&1 && return
        sleep 0.3
    done
    tail -n 20 "$STATE/store/mlflow.log" >&2
    fail "the MLflow server does not answer; the end of its log is above"
}

kill_processes() {
    local pids
    pids=$(ip netns pids "$PREFIX$1" 2>/dev/null || true)
    # shellcheck disable=SC2086
    [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
}

remove_namespace() {
    kill_processes "$1"
    ip link delete "lumos-v$1" 2>/dev/null || true
    ip netns delete "$PREFIX$1" 2>/dev/null || true
}
