// For mongosh: begins a replica set of one member, unless it has begun, and waits for its primary.
// The loop ends after a minute: compose then starts this anew.
try {
  rs.status();
} catch (error) {
  if (error.codeName !== "NotYetInitialized") throw error;
  rs.initiate({ _id: "rs0", members: [{ _id: 0, host: "mongo:27017" }] });
}
let waits = 0;
while (!db.hello().isWritablePrimary) {
  if (++waits > 120) throw new Error("the replica set has no primary");
  sleep(500);
}
print("the replica set has a primary");
