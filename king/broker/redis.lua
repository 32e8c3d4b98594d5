-- The steps on a queue that must happen together, whatever dies in between.
--
-- KEYS[1]  hash: tag -> digit of the priority, then the item
-- KEYS[2]  sorted set: tag -> end of the lease, in seconds of the server's clock
-- ARGV[1]  command
--
-- At maxmemory Redis refuses commands that may need memory, unless the script has written before:
-- so each command begins with one that needs none.
--
--   take       ARGV lease_s, one tag per message;  KEYS[3..] the lists, best priority first
--   ack        ARGV tags
--   renew      ARGV lease_s, tags
--   expired    ARGV the most tags to return
--   give_back  ARGV tag, 'expired' or 'any', LPUSH or RPUSH, item;  KEYS[3] the list

local unacked, leases, command = KEYS[1], KEYS[2], ARGV[1]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

if command == 'take' then
  local lease_end = now + tonumber(ARGV[2])
  local entries = {}
  for i = 3, #KEYS do
    while #entries < #ARGV - 2 do
      local item = redis.call('RPOP', KEYS[i])
      if not item then break end
      local tag = ARGV[#entries + 3]
      local entry = (#KEYS - i) .. item
      redis.call('HSET', unacked, tag, entry)
      redis.call('ZADD', leases, lease_end, tag)
      entries[#entries + 1] = entry
    end
  end
  return entries
end

if command == 'ack' then
  for first = 2, #ARGV, 1000 do  -- unpack has a limit of some thousands
    local last = math.min(first + 999, #ARGV)
    redis.call('HDEL', unacked, unpack(ARGV, first, last))
    redis.call('ZREM', leases, unpack(ARGV, first, last))
  end
  return #ARGV - 1
end

if command == 'renew' then
  redis.call('ZREM', leases, '')
  local lease_end = now + tonumber(ARGV[2])
  -- XX: what another consumer has taken back in the meantime stays gone.
  for i = 3, #ARGV do redis.call('ZADD', leases, 'XX', lease_end, ARGV[i]) end
  return #ARGV - 2
end

if command == 'expired' then
  return redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, ARGV[2])
end

if command == 'give_back' then
  local tag, condition, push, item = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
  if condition == 'expired' then
    -- Its owner may have renewed the lease since the caller asked for expired ones.
    local lease_end = redis.call('ZSCORE', leases, tag)
    if lease_end and tonumber(lease_end) > now then return 0 end
  end
  redis.call('ZREM', leases, tag)
  if redis.call('HDEL', unacked, tag) == 0 then return 0 end
  redis.call(push, KEYS[3], item)
  return 1
end

return redis.error_reply('ERR unknown command ' .. command)
